"""Values as people give them: checked, read from text, and put into messages."""
