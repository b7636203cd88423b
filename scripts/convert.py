"""The `minipeft convert` command by a file, for those who read from here: it is in minipeft/commands/convert.py."""

from minipeft.commands.start import script

if __name__ == "__main__":
    script("convert")
