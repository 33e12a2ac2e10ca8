"""What each VM exit of a TD leads to: handled, reflected as an exception, or a TD exit to the host."""
