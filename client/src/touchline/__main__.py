"""``python -m touchline``."""

from touchline._cli.main import main

if __name__ == "__main__":
    main()
