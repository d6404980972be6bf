"""What is measured in a step: collectives, memory, a timeline."""
