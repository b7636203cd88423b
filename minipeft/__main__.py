"""`python -m minipeft` is the `minipeft` command."""

from minipeft.commands.start import main

if __name__ == "__main__":
    main()
