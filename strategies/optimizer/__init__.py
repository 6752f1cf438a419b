"""What the server does with a combined change."""
