// From the loader to ring 3.
//
// Ring 0 is slow on some hosts, so it does what only it can do: long mode, the registers of descriptor tables. Page
// tables are data of the image. Everything else is Rust in ring 3, which may write any memory, these tables included,
// and asks for services of ring 0 where it needs privilege (stubs.s).

.set SELECTOR_CODE0, 0x08
.set SELECTOR_DATA3, 0x10 | 3
.set SELECTOR_CODE3, 0x18 | 3
.set SELECTOR_TASK, 0x20
.set FLAGS_RING3, 2                 // interrupts off
.set CR0_LONG, 0x80000033           // PG, NE, ET, MP, PE
.set CR4_LONG, 0x620                // PAE, OSFXSR, OSXMMEXCPT
.set MSR_EFER, 0xC0000080
.set EFER_LME, 0x100

// Paging and long mode, from real or protected mode; a far jump has to follow. Changes eax, ecx and edx.
.macro long_mode
    mov eax, offset page_map
    mov cr3, eax
    mov eax, CR4_LONG
    mov cr4, eax
    mov ecx, MSR_EFER
    rdmsr
    or eax, EFER_LME
    wrmsr
    mov eax, CR0_LONG
    mov cr0, eax
.endm

// Where a loader enters (XEN_ELFNOTE_PHYS32_ENTRY of the PVH boot protocol).
.section .note.pvh, "a", @note
    .balign 4
    .long 4, 8, 18
    .asciz "Xen"
    .quad pvh_entry

.section .boot, "ax"
.code32
.global pvh_entry
pvh_entry:
    mov esp, offset scratch_stack_end
    push ebx                        // the physical address of the start information
    long_mode
    lgdt [gdt_register]
    // The first processor's task segment; the address is scattered over the descriptor.
    mov eax, offset tasks
    mov [gdt + SELECTOR_TASK + 2], ax
    shr eax, 16
    mov [gdt + SELECTOR_TASK + 4], al
    mov [gdt + SELECTOR_TASK + 7], ah
    pop ebx
    push SELECTOR_CODE0
    mov eax, offset first_long
    push eax
    retf

.code64
first_long:
    mov edi, ebx
    mov ecx, SELECTOR_TASK
    mov esi, offset first_stack_end - 8
    mov edx, offset first_entry

// Goes to ring 3: task segment in cx, stack in rsi, function in rdx, its argument in rdi.
to_ring3:
    mov esp, offset scratch_stack_end
    push SELECTOR_DATA3
    push rsi
    push FLAGS_RING3
    push SELECTOR_CODE3
    push rdx
    ltr cx
    lidt [idt_register]
    mov eax, SELECTOR_DATA3
    mov ds, eax
    mov es, eax
    iretq

// The other processors begin in real mode in a page below 1 MiB, to which this is copied, one after the other.
.set TRAMPOLINE, 0x8000
.global trampoline
.global trampoline_end
.code16
trampoline:
    cli
    xor ax, ax
    mov ds, ax
    .byte 0x66, 0x0F, 0x01, 0x16    // lgdt with a 32-bit base
    .word (trampoline_gdt_register - trampoline) + TRAMPOLINE
    long_mode
    .byte 0x66, 0xEA                // a far jump to 32 bits of offset
    .long other_long
    .word SELECTOR_CODE0
.balign 8
trampoline_gdt_register:
    .word 0xFFFF
    .long gdt
trampoline_end:

.code64
other_long:
    mov ecx, [other_task]
    mov rsi, [other_stack]
    mov rdi, [other_argument]
    mov edx, offset other_entry
    jmp to_ring3

.section .tables, "aw"
.balign 4096
.global page_map
page_map:                           // 512 GiB an entry; more is added at run time
    .quad page_directories + 7
    .fill 511, 8, 0
page_directories:                   // 1 GiB an entry
    .quad page_directory + 0x0007, page_directory + 0x1007, page_directory + 0x2007, page_directory + 0x3007
    .fill 508, 8, 0
page_directory:                     // the first 4 GiB, 2 MiB an entry: present, writable, for ring 3 too
    .set at, 0
    .rept 2048
    .quad at + 0x87
    .set at, at + 0x200000
    .endr

.set PROCESSORS_MAX, 64
.set STACK0_BYTES, 512

.balign 16
.global gdt
gdt:
    .quad 0
    .quad 0x00AF9A000000FFFF        // code, 64 bit, ring 0
    .quad 0x00CFF2000000FFFF        // data, ring 3
    .quad 0x00AFFA000000FFFF        // code, 64 bit, ring 3
    .quad 0x0000890000000067, 0     // task segments; the addresses are added at run time
    .fill 2 * (PROCESSORS_MAX - 1), 8, 0
gdt_end:

.balign 128
.global tasks
tasks:                              // one for each processor: the stack for ring 0, no permission bitmap
    .set at, stacks0 + STACK0_BYTES
    .rept PROCESSORS_MAX
    .long 0
    .quad at
    .fill 90, 1, 0
    .word 104
    .fill 24, 1, 0
    .set at, at + STACK0_BYTES
    .endr

.global idt
idt:
    .fill 512, 8, 0
idt_end:

.balign 8
    .word 0
gdt_register:
    .word gdt_end - gdt - 1
    .quad gdt
.balign 8
    .word 0
idt_register:
    .word idt_end - idt - 1
    .quad idt

.balign 8
.global other_task
.global other_stack
.global other_argument
other_task:
    .quad 0
other_stack:
    .quad 0
other_argument:
    .quad 0

.section .bss
.balign 64
stacks0:
    .skip PROCESSORS_MAX * STACK0_BYTES
    .skip 512
scratch_stack_end:
    .skip 65536
first_stack_end:
