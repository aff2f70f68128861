__version__ = "0.1.0"

def __getattr__(name):
    "`latentcourse.TextToImage`, imported when somebody asks for it: torch is not needed before."
    if name != 'TextToImage': raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from .pipeline import TextToImage
    return TextToImage

def __dir__(): return sorted({*globals(), 'TextToImage'})
