"""Quality: speed measured against fidelity. Sits on top of the five public functions and changes nothing in them."""
