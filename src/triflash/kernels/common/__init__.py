"""Small pure device functions, and the launcher. Mathematics is shared here, schedules are not."""
