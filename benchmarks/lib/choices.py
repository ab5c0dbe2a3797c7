"""Names that a user chooses from: an unknown one is an error before any work."""

from collections.abc import Collection, Iterable


def check_choices(argument: str, chosen: Iterable[str], known: Collection[str]) -> None:
    """Raises a ValueError if a chosen name is not known.

    Args:
      argument: name of the option, for the message.
      chosen: what the user gave.
      known: what there is.
    """
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise ValueError(f"{argument} must be of {list(known)}, got {unknown}")
