"Packaging: everything it says is read from settings.ini, the file nbdev reads too."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=['='], comment_prefixes=['#'], inline_comment_prefixes=None, interpolation=None)
ini.read(here / 'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']

setup(
    name=cfg['lib_name'], version=cfg['version'], license='Apache-2.0', license_files=['LICENSE'],
    description=cfg['description'], author=cfg['author'], url=cfg['git_url'], keywords=cfg['keywords'].split(),
    long_description=(here / 'README.md').read_text(encoding='utf-8') if (here / 'README.md').exists() else cfg['description'],
    long_description_content_type='text/markdown',
    packages=find_packages(include=['latentcourse', 'latentcourse.*']), include_package_data=True,
    package_data={'latentcourse': ['checkpoints/*', 'style/*']},
    python_requires='>=' + cfg['min_python'], install_requires=cfg['requirements'].split(),
    extras_require={'dev': cfg['dev_requirements'].split(), 'docs': cfg['docs_requirements'].split()},
    entry_points={'console_scripts': cfg['console_scripts'].split()},
    classifiers=['Development Status :: 4 - Beta', 'Intended Audience :: Education', 'Natural Language :: English',
                 'Programming Language :: Python :: 3', 'Framework :: Jupyter'],
    zip_safe=False)
