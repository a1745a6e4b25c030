"""``python -m lwas_fast``: what is installed and which implementations are active."""

from pathlib import Path

from lwas_fast.installed import describe


def main() -> None:
    """Print the table."""
    rows = [*describe(), ("from", str(Path(__file__).parent))]
    width = max(len(what) for what, _ in rows)
    for what, which in rows:
        print(f"{what:<{width}}  {which}")


if __name__ == "__main__":
    main()
