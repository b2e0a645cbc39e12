/* What numpy's and scipy's wheels ask of the C runtime for complex numbers, and Wine 8 has not.
 * Microsoft's complex types are structures, and its long double is a double. */
#include <complex.h>

typedef struct { float re, im; } single;
typedef struct { double re, im; } pair;

#define PARTS(name, type, number, expression) \
    number bridge_##name(type z) { return expression; }
#define WHOLE(name, type, number, call) \
    type bridge_##name(type z) { \
        number complex w = call(z.re + z.im * I); \
        type found = { __real__ w, __imag__ w }; \
        return found; \
    }
#define POWER(name, type, number, call) \
    type bridge_##name(type a, type b) { \
        number complex w = call(a.re + a.im * I, b.re + b.im * I); \
        type found = { __real__ w, __imag__ w }; \
        return found; \
    }
#define ALL(name) \
    WHOLE(name##f, single, float, name##f) \
    WHOLE(name, pair, double, name) WHOLE(name##l, pair, double, name)

PARTS(crealf, single, float, z.re)
PARTS(cimagf, single, float, z.im)
PARTS(cabsf, single, float, cabsf(z.re + z.im * I))
PARTS(cargf, single, float, cargf(z.re + z.im * I))
PARTS(creal, pair, double, z.re)
PARTS(cimag, pair, double, z.im)
PARTS(cabs, pair, double, cabs(z.re + z.im * I))
PARTS(carg, pair, double, carg(z.re + z.im * I))
PARTS(creall, pair, double, z.re)
PARTS(cimagl, pair, double, z.im)
PARTS(cabsl, pair, double, cabs(z.re + z.im * I))
PARTS(cargl, pair, double, carg(z.re + z.im * I))
ALL(cexp) ALL(clog) ALL(csqrt)
ALL(csin) ALL(ccos) ALL(ctan) ALL(csinh) ALL(ccosh) ALL(ctanh)
POWER(cpowf, single, float, cpowf)
POWER(cpow, pair, double, cpow)
POWER(cpowl, pair, double, cpow)
