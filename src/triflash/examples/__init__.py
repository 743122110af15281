"""Programs built on triflash."""
