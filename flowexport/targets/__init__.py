"""One folder a file format; SDKs are imported only when used."""
