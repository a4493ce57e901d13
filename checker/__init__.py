"""The program that checks the katas."""
