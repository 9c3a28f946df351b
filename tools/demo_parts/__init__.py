"""What the demo is made of: text from the running Python, a simulated recogniser, and the steps between them."""
