"""TD entry and TD exit: restoring and saving a vCPU, events injected, what the host sees."""
