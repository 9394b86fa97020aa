"""``python -m touchline``."""

from touchline.console import main

if __name__ == "__main__":
    main()
