"""The model, readable in one sitting: start with rdt.py."""
