"""``python -m touchline``."""

from touchline._cli.console import main

if __name__ == "__main__":
    main()
