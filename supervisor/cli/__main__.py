"""`python -m streamline_pool.supervisor.cli`: the command, where no script is installed."""

from streamline_pool.supervisor.cli.main import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
