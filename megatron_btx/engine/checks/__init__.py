"""What a command line, a layout, a checkpoint or a resume may not be, in one line before any rank trains."""
