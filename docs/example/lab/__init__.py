"""Tasks and a network of one's own, kept outside the package: the example of docs/howto."""
