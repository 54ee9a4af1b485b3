"""A reward that random weights already earn in part, so that every step of a tiny run has something to learn from."""


def digits(response: str, ground_truth: str) -> float:
    """Return the share of digits in the response."""
    return sum(character.isdigit() for character in response) / max(1, len(response))
