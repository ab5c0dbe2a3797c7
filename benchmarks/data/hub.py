"""Hugging Face's copies of data sets, used where there are no local files."""

from typing import Any


def load(name: str, *options: Any, what: str, otherwise: str) -> Any:
    """Loads a data set with the package ``datasets``.

    Args:
      name: the data set.
      *options: more arguments of ``datasets.load_dataset``.
      what: how messages call it.
      otherwise: what else the user can do to get it.

    Returns:
      The splits, by name.

    Raises:
      FileNotFoundError: if it could not be loaded, saying how to get it.
    """
    try:
        import datasets  # pyrefly: ignore[missing-import]

        return datasets.load_dataset(name, *options)
    except Exception as error:
        raise FileNotFoundError(
            f"{what} is not here and could not be loaded from Hugging Face "
            f"({type(error).__name__}: {error}); {otherwise}, or `pip install "
            "'.[hub]'` where the internet is in reach."
        ) from error
