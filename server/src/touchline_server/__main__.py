"""``python -m touchline_server``: the same as the command ``touchline-server``."""

from touchline_server.cli.main import main

if __name__ == "__main__":
    main()
