"""The TDX ABI in one place: numbers, layouts and tables of TDX module 1.5.25. Knows no other floor.

    leaves       SEAMCALL, TDCALL and SEAMLDR leaf numbers, operands
    status       completion statuses, operand ids; `describe(rax)`
    opstate      OP_STATE and which leaves it admits; life cycle; vCPU states
    sept         S-EPT entries: bits, states, which leaf admits which state
    fields       MD_FIELD_ID and the metadata tables with their access masks
    cpuid, msrs  how the module virtualises CPUID and MSRs; MSR numbers
    structs      TD_PARAMS, TDREPORT, TDMR_INFO, PAMT entry, SIGSTRUCT, ... over `wire`, the table-over-bytes base
    migration    MBMD, GPA lists, page lists, metadata lists, service-TD attributes
    exits, vmcs  exit reasons and events; VMCS fields and controls
    ghci         TDG.VP.VMCALL leaves and statuses
    kvm          KVM's TDX user interface
    explain      any of these, decoded for people; `reference` renders all of them as pages

Tables lie in `data/` and are read when first asked for.
"""

MODULE_VERSION = "1.5.25"
"""The TDX module release whose tables these are."""
