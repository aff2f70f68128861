"`python -m latentcourse` is the `latentcourse` command."
from latentcourse.cli import main

if __name__ == '__main__': main()
