"""What a program compiled for absent TPUs says: sizes, collectives, copies, memory."""
