// An operator's Params struct names its fields once, here in C++; the bindings make the Python signature from that
// list.
#pragma once

#include <tuple>

namespace llmengine::ops {

template <class Params, class T>
struct Field {
  const char* name;
  T Params::* member;
};

template <class Params, class T>
constexpr Field<Params, T> field(const char* name, T Params::* member) {
  return {name, member};
}

}  // namespace llmengine::ops
