"""What should be done and said, decided from what is. Pure: no clock, no API, no chance."""
