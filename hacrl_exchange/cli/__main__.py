"""`python -m hacrl_exchange.cli` is `hacrl`."""

from hacrl_exchange.cli import main

if __name__ == "__main__":
    main()
