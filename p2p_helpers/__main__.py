"""``python -m p2p_helpers``."""
from .cli import main

if __name__ == "__main__":
    main()
