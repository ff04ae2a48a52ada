"""Pass small sealed messages between ranks through the launcher's store."""
