"""The paper's published figures, and the command that measures its tables anew."""
