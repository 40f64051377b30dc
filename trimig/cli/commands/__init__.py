"""The commands that work on guests and streams of this process."""
