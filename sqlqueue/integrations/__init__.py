"""What sqlqueue does together with other libraries, each in a module and an extra of its own."""
