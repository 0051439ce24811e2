"""What commands can be told: types, defaults and help of their options. Nothing here imports torch."""
