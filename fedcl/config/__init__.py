"""From words to settings: composing, value rules, checks across keys, guarded instantiation."""
