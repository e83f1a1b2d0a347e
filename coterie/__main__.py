"""`python -m coterie`, where the command itself is not on the path."""

from coterie.cli import main

if __name__ == "__main__":
    main()
