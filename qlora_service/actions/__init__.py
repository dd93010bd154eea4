"""What a user can do, one method per action. `service.Service` holds one object per subject."""
