// What runs in ring 0 after boot: stubs for interrupts and faults, and services for ring 3.

.set SELECTOR_DATA3, 0x10 | 3
.set SELECTOR_CODE3, 0x18 | 3
.set FLAGS_FAULT, 2                  // interrupts off
.set FLAGS_INTERRUPTS, 0x200
.set LAPIC_EOI, 0xFEE000B0
.set QUEUE_VECTORS, 64

.text
.code64

// One for each queue interrupt, 32 bytes apart: count it, end it.
.balign 32
.global queue_stubs
queue_stubs:
    .set at, 0
    .rept QUEUE_VECTORS
    .balign 32
    inc qword ptr [interrupts + at]
    push rax
    xor eax, eax
    movabs [LAPIC_EOI], eax
    pop rax
    iretq
    .set at, at + 64
    .endr

// The timer's: the sleep that it ends is all that it is for.
.balign 32
.global timer_stub
timer_stub:
    push rax
    xor eax, eax
    movabs [LAPIC_EOI], eax
    pop rax
    iretq

// A spurious interrupt must not be ended.
.balign 32
.global spurious_stub
spurious_stub:
    iretq

// Services for ring 3, by `int3`: the number in rax, what it is given in rdi, rsi and rdx, what it gives in rax.
// Interrupts are off on entry. A service may change rcx and the registers named so far, and r8.
//
// Of the ways into ring 0, this is the one that works everywhere. On nested-PVM hosts other software interrupts are
// invalid instructions, what `syscall` leads to may not use ports, and ring 3 may not either, whatever IOPL says.
.balign 32
.global service
service:
    jmp [services + rax * 8]

// wait(counter in rdi, seen in rsi): sleeps until an interrupt, unless the counter has moved from `seen` already. No
// interrupt can come between the look and the sleep: `sti` holds for one instruction more.
service_wait:
    cmp [rdi], rsi
    jne 1f
    sti
    hlt
1:  iretq

// Lets interrupts in, in the ring 3 that is returned to.
service_enable_interrupts:
    or qword ptr [rsp + 16], FLAGS_INTERRUPTS
    iretq

// wrmsr(register in rdi, value in rsi)
service_write_msr:
    mov ecx, edi
    mov eax, esi
    mov rdx, rsi
    shr rdx, 32
    wrmsr
    iretq

// cpuid(leaf in rdi, where to write eax, ebx, ecx, edx in rsi)
service_cpuid:
    mov r8, rbx
    mov eax, edi
    xor ecx, ecx
    cpuid
    mov [rsi], eax
    mov [rsi + 4], ebx
    mov [rsi + 8], ecx
    mov [rsi + 12], edx
    mov rbx, r8
    iretq

// out(port in rdx, value in rdi)
service_out8:
    mov eax, edi
    out dx, al
    iretq

service_out32:
    mov eax, edi
    out dx, eax
    iretq

// in(port in rdx)
service_in8:
    in al, dx
    iretq

service_in32:
    in eax, dx
    iretq

// outs(port in rdx, bytes at rsi, so many in rdi)
service_out_bytes:
    mov rcx, rdi
    rep outsb
    iretq

// In the order of `machine::service::Number`.
.balign 8
services:
    .quad service_wait, service_enable_interrupts, service_write_msr, service_cpuid
    .quad service_out8, service_out32, service_in8, service_in32, service_out_bytes

// Vectors 0 to 31, 16 bytes apart: bring the stack to vector, error code, rip, cs, rflags, rsp, ss.
.balign 16
.global fault_stubs
fault_stubs:
    .set vector, 0
    .rept 32
    .balign 16
    .if ((0x60227D00 >> vector) & 1) == 0
    push 0
    .endif
    push vector
    jmp fault
    .set vector, vector + 1
    .endr

// Goes on in ring 3, which reports and ends the machine.
fault:
    pop qword ptr [fault_record]
    pop qword ptr [fault_record + 8]
    mov rax, [rsp]
    mov [fault_record + 16], rax
    mov rax, cr2
    mov [fault_record + 24], rax
    mov rax, offset fault_entry
    mov [rsp], rax
    mov qword ptr [rsp + 8], SELECTOR_CODE3
    mov qword ptr [rsp + 16], FLAGS_FAULT
    mov rax, offset fault_stack_end - 8
    mov [rsp + 24], rax
    mov qword ptr [rsp + 32], SELECTOR_DATA3
    iretq

.section .bss
.balign 64
.global interrupts
interrupts:                         // one counter for each queue interrupt, a cache line each
    .skip QUEUE_VECTORS * 64
.global fault_record
fault_record:
    .skip 32
    .skip 16384
.balign 16
fault_stack_end:
