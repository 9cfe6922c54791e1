"""`python -m secateurs`: the command line, as torchrun starts it in several processes."""

from secateurs.cli import main

if __name__ == "__main__":
    main()
