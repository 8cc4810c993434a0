"""``python -m flowexport``."""

from flowexport.cli import main

if __name__ == "__main__":
    main()
