"""v2's forward with a backward of one pass, in which programs add to dq atomically."""
