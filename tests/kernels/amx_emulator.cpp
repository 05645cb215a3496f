// Emulates AMX on x86-64 processors without it: executes the instructions that kernels/amx.h uses, with
// PlainTiles, in the handler of the signal that they raise. Tests run the compiled AMX code with it.
#include "../../kernels/amx.h"

#if defined(__linux__) && defined(__x86_64__)
#include <signal.h>
#include <ucontext.h>

#include <atomic>

static struct sigaction former;
static std::atomic<int64_t> emulated;

static int64_t register_of(const greg_t* registers, int number) {
    static const int PLACES[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                                 REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                                 REG_R12, REG_R13, REG_R14, REG_R15};
    return registers[PLACES[number]];
}

// Operand in memory; `index` is the scaled index register, which is the stride of a tile.
struct Operand {
    int64_t base = 0, index = 0, length = 1;  // length: bytes of ModRM, SIB and displacement

    Operand(const uint8_t* at, const greg_t* registers, bool X, bool B) {
        int mode = at[0] >> 6, rm = at[0] & 7;
        bool has_base = true;
        if (rm == 4) {
            int scale = at[1] >> 6, i = (at[1] >> 3 & 7) | X << 3;
            if (i != 4) index = register_of(registers, i) << scale;
            rm = at[1] & 7;
            length = 2;
            has_base = mode != 0 || rm != 5;
        }
        if (has_base) base = register_of(registers, rm | B << 3);
        if (mode == 1) {
            base += int8_t(at[length]);
            length += 1;
        } else if (mode == 2 || !has_base) {
            int32_t displacement;
            memcpy(&displacement, at + length, 4);
            base += displacement;
            length += 4;
        }
    }
};

// Returns the length of the instruction, or 0 if it is not one of AMX.
static int64_t emulate(const uint8_t* code, const greg_t* registers) {
    enum { NONE, P66, PF3, PF2 };
    if (code[0] != 0xc4 || (code[1] & 31) != 2 || (code[2] & 0x84)) return 0;
    bool X = !(code[1] & 0x40), B = !(code[1] & 0x20);
    int other = ~(code[2] >> 3) & 15, prefix = code[2] & 3, opcode = code[3];
    int first = code[4] >> 3 & 7, second = code[4] & 7;
    bool in_memory = code[4] < 0xc0;
    if (opcode == 0x49 && !in_memory && prefix == PF2) return PlainTiles::zero(first), 5;
    if (opcode == 0x49 && code[4] == 0xc0 && prefix == NONE) return PlainTiles::release(), 5;
    if (opcode == 0x5c && !in_memory && prefix == PF3)
        return PlainTiles::multiply_bfloat16(first, second, other), 5;
    if (opcode == 0x5e && !in_memory && prefix == P66)
        return PlainTiles::multiply_bytes<uint8_t, int8_t>(first, second, other), 5;
    if (opcode == 0x5e && !in_memory && prefix == PF3)
        return PlainTiles::multiply_bytes<int8_t, uint8_t>(first, second, other), 5;
    if (!in_memory || (opcode != 0x49 && opcode != 0x4b)) return 0;
    Operand operand(code + 4, registers, X, B);
    if (opcode == 0x49 && prefix == NONE)
        PlainTiles::configure(*(const TileLayout*)(operand.base + operand.index));
    else if (opcode == 0x4b && prefix == PF2)
        PlainTiles::load(first, (const void*)operand.base, operand.index);
    else if (opcode == 0x4b && prefix == PF3)
        PlainTiles::store(first, (void*)operand.base, operand.index);
    else
        return 0;
    return 4 + operand.length;
}

static void handle(int, siginfo_t*, void* context) {
    Arithmetic mode;
    greg_t* registers = ((ucontext_t*)context)->uc_mcontext.gregs;
    int64_t length = emulate((const uint8_t*)registers[REG_RIP], registers);
    if (!length) sigaction(SIGILL, &former, nullptr);  // the instruction is executed again
    registers[REG_RIP] += length;
    emulated += length != 0;
}

EXPORT void start_emulation() {
    struct sigaction action = {};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGILL, &action, &former);
}

// Returns the number of emulated instructions.
EXPORT int64_t end_emulation() {
    sigaction(SIGILL, &former, nullptr);
    return emulated.exchange(0);
}
#endif
