"""One folder a version of the algorithm; `common` holds the mathematics that they share."""
