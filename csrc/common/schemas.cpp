#include "common/schemas.h"

#include <array>
#include <optional>
#include <string_view>
#include <utility>

namespace abiding {
namespace {

struct Parameter {
  std::string_view type, name;

  bool is_tensor() const { return type.substr(0, 6) == "Tensor"; }
  bool is_optional() const { return type.back() == '?'; }
  bool is_list() const { return type.back() == ']'; }
};

// The parameters of "op(Tensor(a!)? x, *, int[] y, float z=1.) -> ()", in order.
std::vector<Parameter> parameters_of(std::string_view schema) {
  std::vector<Parameter> parameters;
  const size_t end = schema.find(") ->");
  for (size_t begin = schema.find('(') + 1, comma; begin < end; begin = comma + 2) {
    comma = std::min(schema.find(", ", begin), end);
    const std::string_view text = schema.substr(begin, comma - begin);
    const size_t space = text.find(' ');
    if (space == text.npos) continue;  // the "*" before those by keyword
    const std::string_view name = text.substr(space + 1);
    parameters.push_back({text.substr(0, space), name.substr(0, name.find('='))});
  }
  return parameters;
}

// Takes the ownership of an argument, and returns the tensor if it is one.
std::optional<Tensor> take(const Parameter& parameter, StableIValue argument) {
  namespace convert = torch::stable::detail;
  if (parameter.is_tensor() && parameter.is_optional()) return convert::to<std::optional<Tensor>>(argument);
  if (parameter.is_tensor()) return convert::to<Tensor>(argument);
  if (parameter.is_optional()) convert::to<std::optional<int64_t>>(argument);
  if (parameter.is_list()) convert::to<std::vector<int64_t>>(argument);
  return std::nullopt;
}

bool ask(const char* question, const Tensor& tensor) {
  StableIValue stack[] = {torch::stable::detail::from(tensor)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(question, "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<bool>(stack[0]);
}

[[noreturn]] void refuse(const char* schema, StableIValue* arguments) {
  const std::string op(schema, std::string_view(schema).find_first_of(".("));
  const std::vector<Parameter> parameters = parameters_of(schema);
  std::vector<std::optional<Tensor>> tensors;
  for (size_t i = 0; i < parameters.size(); ++i) tensors.push_back(take(parameters[i], arguments[i]));
  for (size_t i = 0; i < parameters.size(); ++i) {
    if (!tensors[i] || !tensors[i]->defined()) continue;
    check(!ask("aten::is_neg", *tensors[i]), op.c_str(), parameters[i].name,
          " is a lazily negated view; expected a tensor that holds its values, as .resolve_neg() makes it");
    check(!ask("aten::is_conj", *tensors[i]), op.c_str(), parameters[i].name,
          " is a lazily conjugated view; expected a real tensor, such as view_as_real of what .resolve_conj() makes");
  }
  fail(op.c_str(), "an argument is a lazily negated or conjugated view; expected tensors that hold their values");
}

using Kernel = void (*)(StableIValue*, uint64_t, uint64_t);

// A kernel is a function without data of its own, so each operator gets one, which finds its schema by its number.
constexpr size_t kMaxOperators = 128;
std::array<const char*, kMaxOperators> schemas{};

template <size_t number>
void refusal(StableIValue* stack, uint64_t, uint64_t) {
  refuse(schemas[number], stack);
}

template <size_t... numbers>
constexpr std::array<Kernel, sizeof...(numbers)> all_refusals(std::index_sequence<numbers...>) {
  return {&refusal<numbers>...};
}

}  // namespace

void Schemas::def(const char* schema) {
  static constexpr auto refusals = all_refusals(std::make_index_sequence<kMaxOperators>());
  static size_t count = 0;
  const std::string name(schema, std::string_view(schema).find('('));
  check(count < kMaxOperators, name.c_str(), "this is operator ", count, "; expected at most ", kMaxOperators);
  schemas_.def(schema);
  schemas[count] = schema;
  negative_.impl(name.c_str(), refusals[count]);
  conjugate_.impl(name.c_str(), refusals[count++]);
}

}  // namespace abiding
