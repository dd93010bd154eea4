"""What a user can do, one function per action. The API and the tests call these."""
