"""What breaks, what is promised then, and the tests that show it, with figures."""
