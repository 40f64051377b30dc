"""The commands that drive a guest of another process over QMP."""
