// void llmengine_sim_switch(void** save, void* load): leaves the running stack, whose place goes to *save, and goes on
// where `load` stopped. Only what the calling convention says a callee preserves is kept; the rest is the caller's.
// A new stack begins in llmengine_sim_enter, which calls the function and argument that fibre.cpp put on it.

#if defined(__x86_64__)

    .text
    .globl llmengine_sim_switch
    .hidden llmengine_sim_switch
    .type llmengine_sim_switch, @function
llmengine_sim_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size llmengine_sim_switch, .-llmengine_sim_switch

    .globl llmengine_sim_enter
    .hidden llmengine_sim_enter
    .type llmengine_sim_enter, @function
llmengine_sim_enter:
    movq %r12, %rdi
    callq *%rbx
    ud2
    .size llmengine_sim_enter, .-llmengine_sim_enter

#elif defined(__aarch64__)

    .text
    .globl llmengine_sim_switch
    .hidden llmengine_sim_switch
    .type llmengine_sim_switch, %function
llmengine_sim_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size llmengine_sim_switch, .-llmengine_sim_switch

    .globl llmengine_sim_enter
    .hidden llmengine_sim_enter
    .type llmengine_sim_enter, %function
llmengine_sim_enter:
    mov x0, x20
    blr x19
    brk #1
    .size llmengine_sim_enter, .-llmengine_sim_enter

#endif

    .section .note.GNU-stack,"",%progbits
