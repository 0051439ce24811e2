"""``python -m ghoststore``."""

from ghoststore.cli import main

if __name__ == "__main__":
    main()
